"""The backend `subtoken_triton`. Its modules need Triton, and are imported when it is used."""
