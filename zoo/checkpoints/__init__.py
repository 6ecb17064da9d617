"""Read and write model folders: our own, and those of upstream projects with their configs and tensor names."""
