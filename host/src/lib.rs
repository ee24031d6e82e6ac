//! One native binary that turns many LLM engines into one service, with its decisions in WebAssembly
