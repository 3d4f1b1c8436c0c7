"""What all verbs share on the command line and the console. Nothing here knows of data, models or torch."""
