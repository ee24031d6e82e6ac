//! Hand-offs: what a prefill leg and a decode leg are asked for, protocol by protocol.
//!
//! Contract: a leg's body is the client's with the fields of its protocol put instead of whatever stood there; nothing else
//! of it changes. What an engine said of its KV goes on byte for byte. The protocol is told, or follows from the kind of
//! server; a gateway that hides its kind may be told the protocol alone, so that legs are by protocol, not by dialect.
//!
//! Not checked here: that the engine which decodes makes the same tokens of a chat's messages. vLLM dies of a hand-off for another
//! prompt than it renders; both have the same model and template, which is looked at when they are registered.

mod answer;
mod bootstrap;
mod context;
mod mooncake;
mod nixl;
mod unique;

use std::sync::Arc;

use dynamo_engine_api::{Endpoint, EngineError, Leg, Prefilled, Protocol, Ticket, WholeReply};
use serde_json::value::RawValue;

use self::{bootstrap::Bootstrap, mooncake::Mooncake};
use crate::{body::Fields, engine::SetupError, kind::Kind, options::OpenAiOptions, url::EngineUrl};

/// One engine's part in hand-offs.
#[derive(Debug)]
pub(crate) struct Handoff {
    engine: Arc<str>,
    told: Option<Protocol>,
    bootstrap: Bootstrap,
    mooncake: Option<Mooncake>,
}

impl Handoff {
    pub(crate) fn new(engine: Arc<str>, url: &EngineUrl, options: &OpenAiOptions) -> Result<Self, SetupError> {
        let host = options.bootstrap_host.as_deref().unwrap_or(url.host());
        let told = options.handoff;
        let mooncake = (told == Some(Protocol::Mooncake)).then(|| Mooncake::new(host, options)).transpose()?;
        Ok(Self { engine, told, bootstrap: Bootstrap::new(host, options.bootstrap_port), mooncake })
    }

    /// How a server of this kind hands over, unless it was told.
    pub(crate) fn protocol(&self, kind: Kind, is_mock: bool) -> Option<Protocol> {
        self.told.or(match kind {
            Kind::Vllm => Some(Protocol::Nixl),
            Kind::Sglang => Some(Protocol::Bootstrap),
            Kind::Trtllm => Some(Protocol::Context),
            Kind::Openai if is_mock => Some(Protocol::Nixl),
            Kind::Llamacpp | Kind::Openai => None,
        })
    }

    /// Makes a ticket.
    pub(crate) async fn ticket(&self, protocol: Option<Protocol>, rank: Option<u32>) -> Result<Ticket, EngineError> {
        match protocol {
            Some(Protocol::Bootstrap) => Ok(self.bootstrap.ticket(rank)),
            Some(Protocol::Mooncake) => {
                let mooncake =
                    self.mooncake.as_ref().ok_or_else(|| self.refused("hand-offs by mooncake have to be configured"))?;
                mooncake.ticket(rank).await
            }
            Some(protocol) => Err(self.refused(format!("in a hand-off by {protocol} the prefill's answer is the ticket"))),
            None => Err(self.none()),
        }
    }

    /// Puts what a leg needs into its fields. Whether the answer is a stream if the client wants one.
    pub(crate) fn leg(
        &self,
        protocol: Option<Protocol>,
        leg: &Leg,
        endpoint: Endpoint,
        fields: &mut Fields,
    ) -> Result<bool, EngineError> {
        if matches!(leg, Leg::Whole) {
            return Ok(true);
        }
        let protocol = protocol.ok_or_else(|| self.none())?;
        if !matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
            return Err(self.refused(format!("requests to {} are not handed over", endpoint.path())));
        }
        if let Leg::Prefill(Some(ticket)) | Leg::Decode(ticket) = leg
            && ticket.protocol != protocol
        {
            return Err(self.refused(format!("it hands over by {protocol}, and the ticket is of {}", ticket.protocol)));
        }
        match (protocol, leg) {
            (_, Leg::Whole) => {}
            (Protocol::Nixl, Leg::Prefill(_)) => nixl::prefill(endpoint, fields),
            (Protocol::Nixl, Leg::Decode(ticket)) => nixl::decode(ticket, endpoint, fields),
            (Protocol::Context, Leg::Prefill(_)) => context::prefill(fields),
            (Protocol::Context, Leg::Decode(ticket)) => context::decode(ticket, endpoint, fields),
            (Protocol::Bootstrap | Protocol::Mooncake, Leg::Prefill(None)) => {
                return Err(self.refused(format!("a prefill by {protocol} needs a ticket")));
            }
            (Protocol::Bootstrap, Leg::Prefill(Some(ticket)) | Leg::Decode(ticket)) => {
                bootstrap::both(ticket, fields).map_err(|reason| self.refused(reason))?;
            }
            (Protocol::Mooncake, Leg::Prefill(Some(ticket))) => {
                mooncake::prefill(ticket, endpoint, fields).map_err(|reason| self.refused(reason))?;
            }
            (Protocol::Mooncake, Leg::Decode(ticket)) => mooncake::decode(ticket, fields),
        }
        Ok(!matches!(leg, Leg::Prefill(_)) || protocol == Protocol::Bootstrap)
    }

    /// Reads an answer to a prefill leg.
    pub(crate) fn prefilled(&self, protocol: Option<Protocol>, reply: &WholeReply) -> Result<Prefilled, EngineError> {
        let read = match protocol {
            Some(Protocol::Nixl) => nixl::prefilled(&reply.body),
            Some(Protocol::Context) => context::prefilled(&reply.body),
            Some(protocol) => Err(format!("in a hand-off by {protocol} a prefill's answer says nothing")),
            None => return Err(self.none()),
        };
        read.map_err(|reason| self.refused(reason))
    }

    /// What makes of a decode leg one that only gives up the KV that it is about; nothing where there is no such way, and the
    /// KV is kept until its lease ends.
    pub(crate) fn release(protocol: Option<Protocol>, endpoint: Endpoint) -> Option<Fields> {
        (protocol == Some(Protocol::Nixl)).then(|| {
            let mut fields = Fields::default();
            nixl::one_token(endpoint, &mut fields);
            fields
        })
    }

    fn none(&self) -> EngineError {
        self.refused("it hands no KV over, as far as is known; if it does, say how by handoff = \"nixl\", \"mooncake\", \"bootstrap\" or \"context\"")
    }

    pub(crate) fn refused(&self, reason: impl Into<String>) -> EngineError {
        EngineError::Protocol { engine: self.engine.to_string(), reason: reason.into() }
    }
}

/// JSON that was just made.
fn raw(json: String) -> Arc<RawValue> {
    RawValue::from_string(json).expect("what was written as JSON is JSON").into()
}

#[cfg(test)]
mod tests;
