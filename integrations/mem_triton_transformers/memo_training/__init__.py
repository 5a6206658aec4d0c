"""Training of memory models: questions and answers packed behind the prefix that they share, by trl and peft."""
