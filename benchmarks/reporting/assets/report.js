for (const table of document.querySelectorAll("table.figures")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = body => body.rows[0].cells[column].dataset.key;
    const number = body => Number(key(body).replace("inf", "Infinity"));
    const bodies = [...table.tBodies];
    const numeric = bodies.every(body => !Number.isNaN(number(body)));
    const order = (a, b) => numeric ? (number(a) > number(b)) - (number(a) < number(b)) : key(a).localeCompare(key(b));
    bodies.sort((a, b) => order(a, b) * (down ? -1 : 1));
    table.append(...bodies);
  }));
}
for (const button of document.querySelectorAll("button.all")) {
  const far = button.closest("section").querySelectorAll("tbody.far");
  button.addEventListener("click", () => {
    const all = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", all);
    button.textContent = all ? button.dataset.near : button.dataset.all;
    far.forEach(body => { body.hidden = !all; });
  });
}
