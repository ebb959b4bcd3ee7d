"""What people look at: the statistics of a data set as a picture and as one HTML file."""
