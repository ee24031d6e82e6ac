//! What the generator (`load`) and the fake engine (`engine`) share: just enough HTTP/1.1 for OpenAI's streams.
//!
//! They run on the machine whose proxies are measured, so each is one thread, and a token costs one write here and a
//! search for a newline there. A full HTTP library in either would cost more than the proxy between them.

pub mod http;
pub mod replies;
