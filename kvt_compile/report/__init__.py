"""What a person sees of a run of the passes: facts below, views above, the face (report.py) on top."""
