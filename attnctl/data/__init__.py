"""What runs leave behind: maps, records, pictures, clips."""
