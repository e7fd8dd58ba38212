"""Awaits work of a GPU in asyncio, while the event loop goes on with other things."""

import asyncio

import torch

from hogstream.scheduler import cuda_event_done


async def product(matrix: torch.Tensor) -> torch.Tensor:
    """Multiplies a matrix by itself on a stream of its own; returns when the GPU has done it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the matrix
    with torch.cuda.stream(stream):
        result = matrix @ matrix
    event = torch.cuda.Event()
    event.record(stream)
    await cuda_event_done(event)
    return result


async def count(turns: list[int]) -> None:
    """Shows that the event loop is free: each turn is one of its own."""
    while True:
        turns[0] += 1
        await asyncio.sleep(0)


async def main() -> None:
    """Waits for several products at once."""
    matrices = [torch.randn(4096, 4096, device="cuda") for _ in range(4)]
    turns = [0]
    counting = asyncio.create_task(count(turns))
    results = await asyncio.gather(*map(product, matrices))
    counting.cancel()
    print(f"{len(results)} products; the event loop made {turns[0]:,} turns meanwhile")


if __name__ == "__main__":
    if torch.cuda.is_available():
        asyncio.run(main())
    else:
        print("skipped: there is no CUDA device here")
