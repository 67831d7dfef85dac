"""The backend `subtoken`: `experts` and, under torch.compile, `compiled`; `tuning` has the numbers they go by."""
