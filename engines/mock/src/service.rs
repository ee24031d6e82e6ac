//! Service: from a request's body to sequences, and from their tokens to vLLM's replies.
//!
//! Contract: shapes, field order, error bodies and the rules about them are those of a vLLM 0.32 server. What a
//! model would decide is fixed instead: the output is numbered ([`crate::tokens`]) and exactly as long as the
//! request allows, ending with `length`; a chat without a limit has a length of its own and ends with `stop`.

mod anthropic;
mod embeddings;
mod error;
mod fields;
mod order;
mod prompt;
mod reply;
mod responses;
mod shapes;
mod whole;

pub(crate) use self::{
    error::ApiError,
    order::{Order, count_tokens, decode, decode_tokenize},
    reply::Rendering,
    whole::Whole,
};
