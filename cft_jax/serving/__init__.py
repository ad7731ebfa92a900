"""Does a server sample what the model says? A client of OpenAI-compatible servers, and statistics of what they draw."""
