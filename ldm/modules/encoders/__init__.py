"""What turns a condition, such as a class or a text, into embeddings the UNet attends to."""
