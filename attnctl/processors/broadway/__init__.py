"""More motion in videos: BroadWay, its fields and what it does at each attention."""
