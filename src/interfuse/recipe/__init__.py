"""Recipes: what the user wrote, read strictly. The form is `schema`'s, reading `load`'s, what holds between keys `check`'s."""

from interfuse.recipe.json_schema import recipe_schema as recipe_schema
from interfuse.recipe.load import check_recipe as check_recipe
from interfuse.recipe.load import check_recipes as check_recipes
from interfuse.recipe.load import load_recipe as load_recipe
from interfuse.recipe.load import load_recipes as load_recipes
from interfuse.recipe.schema import Recipe as Recipe
