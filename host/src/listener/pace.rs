//! How fast a client must take what is there for it.
//!
//! A body that nobody reads is not even polled any more, and would hold its engine for ever: so it is the connection's writes that
//! fail. What waits for a client is bounded (`limits.client_buffer_bytes`, and hyper's own buffer); once that is full, a
//! client that takes less than [`MIN_TAKEN_BYTES`] within the stall, be it by a few bytes a minute, or that has not taken its
//! answer by the request's deadline, is given up. Costs a timer per wait, not per write.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// What a client that is behind must take to be given as much time again.
const MIN_TAKEN_BYTES: usize = 16 << 10;

/// By when an answer must be with its client: an extension of the response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TakenBy(pub(crate) Instant);

/// The pace that is asked of one connection's client.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    stall: Duration,
    /// When the connection began.
    since: Instant,
    /// Milliseconds from then to the deadline of the answer that is written; 0 if it has none.
    take_by_ms: Arc<AtomicU64>,
}

impl Pace {
    pub(super) fn new(stall: Duration) -> Self {
        Self { stall, since: Instant::now(), take_by_ms: Arc::default() }
    }

    /// Sets the deadline of the answer that comes next.
    pub(super) fn take_by(&self, deadline: Option<TakenBy>) {
        let ms = deadline.map_or(0, |TakenBy(at)| (at.saturating_duration_since(self.since).as_millis() as u64).max(1));
        self.take_by_ms.store(ms, Relaxed);
    }

    fn deadline(&self) -> Option<Instant> {
        Some(self.take_by_ms.load(Relaxed)).filter(|&ms| ms > 0).map(|ms| self.since + Duration::from_millis(ms))
    }
}

/// A connection whose writes fail when its client does not keep pace.
pub(super) struct Impatient<S> {
    inner: S,
    pace: Pace,
    /// While the client is behind.
    wait: Option<Wait>,
}

struct Wait {
    alarm: Pin<Box<Sleep>>,
    /// Whether it is the deadline that it rings for.
    is_last: bool,
    taken: usize,
}

impl<S> Impatient<S> {
    pub(super) fn new(inner: S, pace: Pace) -> Self {
        Self { inner, pace, wait: None }
    }

    /// `offered`: bytes that were there to be taken.
    fn bound(&mut self, context: &mut Context<'_>, offered: usize, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(taken)) => {
                let is_behind = self.wait.as_mut().is_some_and(|wait| {
                    wait.taken += taken;
                    taken < offered && wait.taken < MIN_TAKEN_BYTES
                });
                if !is_behind {
                    self.wait = None;
                }
                written
            }
            Poll::Ready(Err(_)) => written,
            Poll::Pending => self.poll_alarm(context).map(Err),
        }
    }

    fn poll_alarm(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let Self { pace, wait, .. } = self;
        let wait = wait.get_or_insert_with(|| {
            let (stalled, deadline) = (Instant::now() + pace.stall, pace.deadline());
            let is_last = deadline.is_some_and(|deadline| deadline < stalled);
            let until = deadline.map_or(stalled, |deadline| deadline.min(stalled));
            Wait { alarm: Box::pin(tokio::time::sleep_until(until.into())), is_last, taken: 0 }
        });
        ready!(wait.alarm.as_mut().poll(context));
        let cause = if wait.is_last { "deadline" } else { "stalled" };
        metrics::counter!("dynamo_host_slow_clients_total", "cause" => cause).increment(1);
        let text = match wait.is_last {
            true => "the client had not taken its answer by the request's deadline".to_owned(),
            false => format!("the client took {} bytes in {} s", wait.taken, pace.stall.as_secs()),
        };
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, text))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bound(context, bytes.len(), written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.bound(context, slices.iter().map(|slice| slice.len()).sum(), written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const NOW: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_write_that_nobody_reads_fails_and_one_that_is_read_does_not() {
        let (writer, mut reader) = tokio::io::duplex(4);
        let mut writer = Impatient::new(writer, Pace::new(NOW));
        let error = writer.write_all(b"too much").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        reader.read_exact(&mut [0; 4]).await.unwrap();
        writer.write_all(b"fits").await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_takes_a_byte_now_and_then_is_given_up_like_one_that_takes_nothing() {
        let (writer, mut reader) = tokio::io::duplex(4);
        let mut writer = Impatient::new(writer, Pace::new(Duration::from_millis(50)));
        let sip = async {
            loop {
                reader.read_exact(&mut [0; 1]).await.unwrap();
                tokio::time::sleep(NOW).await;
            }
        };
        let plenty = [b'x'; MIN_TAKEN_BYTES];
        tokio::select! {
            written = writer.write_all(&plenty) => assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut),
            () = sip => unreachable!("it never ends"),
        }
    }

    #[tokio::test]
    async fn a_client_that_keeps_pace_is_given_time_again_and_again() {
        let (writer, mut reader) = tokio::io::duplex(4096);
        let mut writer = Impatient::new(writer, Pace::new(LONG));
        let read = async {
            let mut all = vec![0; 1 << 20];
            reader.read_exact(&mut all).await.unwrap();
        };
        let write = async {
            writer.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
            assert!(writer.wait.as_ref().is_none_or(|wait| wait.taken < MIN_TAKEN_BYTES));
        };
        tokio::join!(read, write);
    }

    #[tokio::test]
    async fn the_deadline_ends_a_write_however_patient_the_rest_is() {
        let (writer, _reader) = tokio::io::duplex(4);
        let pace = Pace::new(LONG);
        let mut writer = Impatient::new(writer, pace.clone());
        pace.take_by(Some(TakenBy(Instant::now() + NOW)));
        let error = writer.write_all(b"too much").await.unwrap_err();
        assert!(error.to_string().contains("deadline"), "{error}");
    }
}
