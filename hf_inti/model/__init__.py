"""The core of the library, and exactly what is uploaded with a checkpoint. Flat; imports nothing from outside."""
