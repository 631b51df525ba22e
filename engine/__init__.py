"""The machinery under the scripts at the top; nobody need open it to use or to change the recipe."""
