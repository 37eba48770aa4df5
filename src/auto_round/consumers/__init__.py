"""What the engines that load a finished folder demand of it, and whether it complies."""
