"""Shape annotations: jaxtyping's where it is installed (development), plain tensors where it is not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Unchecked:
            """Stands for an annotation: `Float[Tensor, "batch 3"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:  # noqa: ANN401
                return item[0]

        Bool = Float = Int = UInt8 = _Unchecked

__all__ = ["Bool", "Float", "Int", "UInt8"]
