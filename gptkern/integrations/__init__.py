"""What makes gptkern known to other libraries, one module a library: importing it is all there is to do."""
