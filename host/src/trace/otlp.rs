//! Export of spans over OTLP/HTTP: a bounded queue, batches, one exchange each.
//!
//! Contract: the request path never waits for it. What finds the queue full, or could not be delivered, is gone and
//! counted (`dynamo_host_trace_spans_dropped_total`). Sampling follows the client's own decision, if there is one.
//!
//! The SDK's batch processor is not used: it blocks a thread of its own on a client that needs our runtime, and does
//! not tell what it drops.

use std::{collections::BTreeMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use dynamo_engine_api::Endpoint;
use http::{Request, Response};
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanBuilder, SpanKind, TraceContextExt as _, Tracer as _, TracerProvider as _},
};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor},
};
use rustls::ClientConfig;
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};

use super::{Parent, SpanFacts};
use crate::{exchange::exchange, tasks, text::plain, tls};

/// Spans that wait for their export.
const QUEUE: usize = 8192;
/// Spans of one export, and how long the first waits for the others.
const BATCH: usize = 512;
const INTERVAL: Duration = Duration::from_secs(2);
/// How long one export may take, and the last one at the end.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
const LAST_EXPORT: Duration = Duration::from_secs(5);

const PATH: &str = "/v1/traces";

/// `[otlp]` of the configuration file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Otlp {
    /// URL of a collector, with or without `/v1/traces`.
    pub(crate) endpoint: String,
    #[serde(default)]
    pub(crate) protocol: WireFormat,
    #[serde(default = "default_service_name")]
    pub(crate) service_name: String,
    /// The part of requests that is traced, of those whose client did not decide.
    #[serde(default = "default_sample_ratio")]
    pub(crate) sample_ratio: f64,
    /// Headers of each export, such as a token.
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
}

/// How spans are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum WireFormat {
    #[default]
    #[serde(rename = "http/protobuf")]
    Protobuf,
    #[serde(rename = "http/json")]
    Json,
}

fn default_service_name() -> String {
    "dynamo-host".to_owned()
}

fn default_sample_ratio() -> f64 {
    1.0
}

/// An export that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OtlpError {
    #[error("otlp.endpoint is {endpoint:?}; write the URL of a collector, such as http://127.0.0.1:4318")]
    Endpoint { endpoint: String },
    #[error("otlp.sample_ratio is {ratio}; use 0 to 1")]
    Ratio { ratio: f64 },
    #[error("traces cannot be exported to {endpoint}: {reason}")]
    Exporter { endpoint: String, reason: String },
}

impl Otlp {
    /// What the environment asks for, in the words of OpenTelemetry.
    pub(crate) fn from_environment() -> Option<Self> {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = text("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").or_else(|| text("OTEL_EXPORTER_OTLP_ENDPOINT"))?;
        let protocol = match text("OTEL_EXPORTER_OTLP_PROTOCOL").as_deref() {
            Some("http/json") => WireFormat::Json,
            _ => WireFormat::Protobuf,
        };
        Some(Self {
            endpoint,
            protocol,
            service_name: text("OTEL_SERVICE_NAME").unwrap_or_else(default_service_name),
            sample_ratio: text("OTEL_TRACES_SAMPLER_ARG").and_then(|ratio| ratio.parse().ok()).unwrap_or(1.0),
            headers: BTreeMap::new(),
        })
    }

    /// Whether it can be.
    pub(crate) fn check(&self) -> Result<(), OtlpError> {
        let endpoint: Option<http::Uri> = self.endpoint.parse().ok();
        if !endpoint.is_some_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()) {
            return Err(OtlpError::Endpoint { endpoint: self.endpoint.clone() });
        }
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            return Err(OtlpError::Ratio { ratio: self.sample_ratio });
        }
        Ok(())
    }

    fn url(&self) -> String {
        let endpoint = self.endpoint.trim_end_matches('/');
        if endpoint.ends_with(PATH) { endpoint.to_owned() } else { format!("{endpoint}{PATH}") }
    }
}

/// Traces that are exported.
#[derive(Debug)]
pub(crate) struct Traces {
    tracer: SdkTracer,
    queue: mpsc::Sender<Queued>,
    /// Holds what the tracer only refers to.
    _provider: SdkTracerProvider,
}

#[derive(Debug)]
enum Queued {
    Span(Box<SpanData>),
    /// Export all before this, then say so.
    Flush(oneshot::Sender<()>),
}

impl Traces {
    /// Starts the export.
    ///
    /// # Errors
    /// If it can never succeed; a collector that is not there yet is no error.
    pub(crate) fn start(otlp: &Otlp) -> Result<Self, OtlpError> {
        otlp.check()?;
        let url = otlp.url();
        let fails = |reason: String| OtlpError::Exporter { endpoint: url.clone(), reason };
        let tls = match url.starts_with("https:") {
            true => Some(tls::client_config(None, None).map_err(|error| fails(error.to_string()))?),
            false => None,
        };
        let protocol = match otlp.protocol {
            WireFormat::Protobuf => Protocol::HttpBinary,
            WireFormat::Json => Protocol::HttpJson,
        };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client { tls })
            .with_endpoint(&url)
            .with_protocol(protocol)
            .with_timeout(EXPORT_TIMEOUT)
            .with_headers(otlp.headers.clone().into_iter().collect())
            .build();
        let mut exporter = exporter.map_err(|error| fails(error.to_string()))?;
        let resource = Resource::builder()
            .with_service_name(otlp.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        exporter.set_resource(&resource);
        let (queue, queued) = mpsc::channel(QUEUE);
        tasks::spawn("trace export", export(exporter, queued));
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(otlp.sample_ratio))))
            .with_span_processor(Queue { queue: queue.clone(), dropped: dropped("queue") })
            .build();
        Ok(Self { tracer: provider.tracer("dynamo-host"), queue, _provider: provider })
    }

    /// What makes a subscriber listen.
    pub(crate) fn layer(&self) -> SpanFacts {
        SpanFacts::new(self.tracer.clone())
    }

    /// Begins a request's span, below the client's if there is one.
    pub(crate) fn begin(&self, endpoint: Endpoint, parent: Option<&Parent>) -> Context {
        let above = parent.map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent.context()));
        let builder = SpanBuilder::from_name(format!("POST {}", endpoint.path())).with_kind(SpanKind::Server).with_attributes([
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("http.route", endpoint.path()),
            KeyValue::new("dynamo_host.endpoint", endpoint.label()),
        ]);
        let span = self.tracer.build_with_context(builder, &above);
        above.with_span(span)
    }

    /// Exports what is left, for a while.
    pub(crate) async fn stop(&self) {
        let (done, is_done) = oneshot::channel();
        let flushed = async {
            if self.queue.send(Queued::Flush(done)).await.is_ok() {
                let _ = is_done.await;
            }
        };
        if tokio::time::timeout(LAST_EXPORT, flushed).await.is_err() {
            tracing::warn!("the last spans of traces were not delivered within {} s", LAST_EXPORT.as_secs());
        }
    }
}

fn dropped(cause: &'static str) -> metrics::Counter {
    metrics::counter!("dynamo_host_trace_spans_dropped_total", "cause" => cause)
}

/// Where spans end.
#[derive(Debug)]
struct Queue {
    queue: mpsc::Sender<Queued>,
    dropped: metrics::Counter,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.queue.try_send(Queued::Span(Box::new(span))).is_err() {
            self.dropped.increment(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

async fn export(exporter: SpanExporter, mut queued: mpsc::Receiver<Queued>) {
    let undelivered = dropped("export");
    let mut complaint = false;
    let mut items = Vec::with_capacity(BATCH);
    while queued.recv_many(&mut items, BATCH).await > 0 {
        let is_waited_for = |items: &[Queued]| items.iter().any(|item| matches!(item, Queued::Flush(_)));
        let full = tokio::time::sleep(INTERVAL);
        tokio::pin!(full);
        while items.len() < BATCH && !is_waited_for(&items) {
            let room = BATCH - items.len();
            tokio::select! {
                () = &mut full => break,
                more = queued.recv_many(&mut items, room) => if more == 0 { break },
            }
        }
        let (mut spans, mut waiting) = (Vec::with_capacity(items.len()), Vec::new());
        for item in items.drain(..) {
            match item {
                Queued::Span(span) => spans.push(*span),
                Queued::Flush(done) => waiting.push(done),
            }
        }
        let count = spans.len() as u64;
        if count > 0 {
            let exported = tokio::time::timeout(EXPORT_TIMEOUT, exporter.export(spans)).await;
            let failed = match exported {
                Ok(exported) => exported.err().map(|error| error.to_string()),
                Err(_) => Some(format!("no answer within {} s", EXPORT_TIMEOUT.as_secs())),
            };
            if let Some(reason) = &failed {
                undelivered.increment(count);
                if !complaint {
                    tracing::warn!("spans of traces are lost until their collector takes them again: {}", plain(reason));
                }
            } else if complaint {
                tracing::info!("spans of traces are delivered again");
            }
            complaint = failed.is_some();
        }
        for done in waiting {
            // Whoever waited may have given up.
            let _ = done.send(());
        }
    }
}

/// The exporter's way to its collector.
#[derive(Debug)]
struct Client {
    tls: Option<Arc<ClientConfig>>,
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async { exchange(request, self.tls.as_ref()).await.map_err(HttpError::from) })
    }
}
