"""The words of a model folder as data: tokens, unions of vocabularies, rows of embeddings, chat templates. No tokenizing."""
