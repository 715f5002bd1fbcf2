"""Other people's trainers and formats, by real trainings in miniature: `make integrations`."""
