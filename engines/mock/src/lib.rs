//! A model of an LLM engine
