//! Lets requests in: what they hold from then to their end.

use dynamo_host_core::RequestFacts;

use crate::{error::RequestError, request::Lane};

/// One request's place among those that run, over all its attempts. Dropped, another may take it.
#[derive(Debug)]
pub(crate) struct Permit(());

/// Waits until a request may run.
#[expect(clippy::unused_async, reason = "nothing waits yet")]
pub(crate) async fn enter(_lane: &Lane, _facts: &mut RequestFacts) -> Result<Permit, RequestError> {
    Ok(Permit(()))
}

impl Permit {
    /// Tokens of output came; the first ones tell that the prompt is computed.
    #[expect(clippy::unused_self, reason = "nothing is counted yet")]
    pub(crate) fn output(&mut self, _tokens: u32) {}
}
