"""The modules that passes put into models, each with its exact export form."""
