"""Trains the same network with torch's RMSprop and with ours in its place, from the same start."""

import torch

from hogstream.optim import RMSprop, RMSpropAsync

STEPS = 200


def make_model() -> torch.nn.Module:
    """Always the same network: the seed says so."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Learns to add eight numbers; returns the last loss."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(64, 8, generator=generator)
        loss = torch.nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Prints the last loss of each."""
    for name, make in (
        ("torch.optim.RMSprop", torch.optim.RMSprop),
        ("hogstream.optim.RMSprop", RMSprop),  # the same arguments, defaults and numbers
        ("RMSpropAsync", RMSpropAsync),  # ChainerRL's: eps inside the root
    ):
        model = make_model()
        optimizer: torch.optim.Optimizer = make(model.parameters(), lr=0.01)
        print(f"{name:<24} {train(model, optimizer):.4f}")


if __name__ == "__main__":
    main()
