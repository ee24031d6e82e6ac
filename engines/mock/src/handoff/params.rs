//! Params: `kv_transfer_params` of requests and answers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What a request says of its KV.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Transfer {
    /// Nothing.
    #[default]
    None,
    /// It is to be kept for another engine.
    Keep,
    /// Another engine has it.
    Fetch(Box<Remote>),
}

impl Transfer {
    /// Reads a request's parameters. What says neither, or not where the KV is, says nothing, as with vLLM.
    pub(crate) fn read(params: &Value) -> Self {
        let says = |name: &str| params.get(name).and_then(Value::as_bool).unwrap_or_default();
        if says("do_remote_prefill") {
            return Remote::deserialize(params).map_or(Self::None, |remote| Self::Fetch(Box::new(remote)));
        }
        if says("do_remote_decode") { Self::Keep } else { Self::None }
    }
}

/// Where KV is.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub(crate) struct Remote {
    #[serde(rename = "remote_engine_id")]
    pub(crate) engine_id: String,
    #[serde(rename = "remote_request_id")]
    pub(crate) request_id: String,
    #[serde(rename = "remote_host")]
    pub(crate) host: String,
    #[serde(rename = "remote_port")]
    pub(crate) port: u16,
    #[serde(rename = "remote_num_tokens")]
    pub(crate) tokens: u32,
}

/// What an answer says of KV that is kept, in vLLM's order.
#[derive(Debug, Serialize)]
pub(crate) struct Kept<'a> {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    remote_block_ids: [Vec<u32>; 1],
    remote_engine_id: &'a str,
    remote_request_id: String,
    remote_host: Option<IpAddr>,
    remote_port: Option<u16>,
    tp_size: u32,
    dcp_size: u32,
    pp_size: u32,
    remote_num_tokens: u32,
    remote_blocks_expiry_time: Option<f64>,
    transfer_mode: &'static str,
    remote_prefill_cached_tokens: u32,
}

impl<'a> Kept<'a> {
    pub(super) fn new(
        engine_id: &'a str,
        request_id: String,
        blocks: Vec<u32>,
        address: Option<SocketAddr>,
        tokens: u32,
        cached_tokens: u32,
    ) -> Self {
        // What listens everywhere is found here at least.
        let host = |address: SocketAddr| match address.ip() {
            ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            ip => ip,
        };
        Self {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_block_ids: [blocks],
            remote_engine_id: engine_id,
            remote_request_id: request_id,
            remote_host: address.map(host),
            remote_port: address.map(|address| address.port()),
            tp_size: 1,
            dcp_size: 1,
            pp_size: 1,
            remote_num_tokens: tokens,
            remote_blocks_expiry_time: None,
            transfer_mode: "pull",
            remote_prefill_cached_tokens: cached_tokens,
        }
    }
}

/// What tells a prompt from others.
pub(crate) fn digest(prompt: &[u32], salt: u64) -> u64 {
    let bytes: Vec<u8> = prompt.iter().flat_map(|token| token.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, salt)
}
