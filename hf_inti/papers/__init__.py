"""The papers' published tables and their authors' released weights."""
