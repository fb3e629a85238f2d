"""The small trainer that organisms and fine-tuning studies share."""
