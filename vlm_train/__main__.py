"""`python -m vlm_train`."""

from vlm_train import agent, cli

if __name__ == "__main__":
    agent.leave(cli.main)
