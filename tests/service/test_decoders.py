"""Whose file is decoded next."""

import asyncio

import pytest

from unperturb.service.decoding.decoders import Turns


def test_who_has_many_files_waits_behind_them_and_nobody_else() -> None:
    async def order() -> list[str]:
        turns, taken = Turns(1), list[str]()

        async def file(client: str) -> None:
            await turns.acquire(client)
            taken.append(client)
            turns.release()

        await turns.acquire("many")
        waiting = [asyncio.create_task(file(client)) for client in ["many"] * 5 + ["few"] * 2]
        await asyncio.sleep(0)
        turns.release()
        await asyncio.gather(*waiting)
        return taken

    assert asyncio.run(order()) == ["many", "few", "many", "few", "many", "many", "many"]


@pytest.mark.parametrize("let_in", [False, True])
def test_one_that_goes_while_it_waits_leaves_its_place_to_the_next(let_in: bool) -> None:
    async def run() -> None:
        turns = Turns(1)
        await turns.acquire("a")
        goes, stays = (asyncio.create_task(turns.acquire(client)) for client in ("b", "c"))
        await asyncio.sleep(0)
        for act in (turns.release, goes.cancel) if let_in else (goes.cancel, turns.release):
            act()
        await asyncio.wait_for(stays, 10)
        turns.release()
        await asyncio.wait_for(turns.acquire("d"), 10)  # and the place is not lost
        assert goes.cancelled()

    asyncio.run(run())
