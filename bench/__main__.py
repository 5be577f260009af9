"""`python -m bench`: the same as `farebox bench`."""

from gateway.cli.bench import bench

if __name__ == "__main__":
    bench(prog_name="farebox bench")
