//! Adapter for OpenAI-compatible servers
