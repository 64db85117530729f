"""What puts a model under control and takes it off again. It knows no method."""
