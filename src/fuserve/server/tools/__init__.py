"""Tool calls: telling the model about its tools, and finding its calls in what it writes."""
