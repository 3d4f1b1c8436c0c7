"""`python -m llava_accel.recipe` prints the JSON schema that editors complete and check recipes with."""

from llava_accel.recipe import recipe_schema

print(recipe_schema(), end="")
