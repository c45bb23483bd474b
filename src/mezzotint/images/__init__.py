"""Pictures as files (`io`) and as the start of a run (`init_image`)."""
