"""What is built on the engine and stands beside a run: the commands of `ds-longft`. The engine imports none of it."""
