//! The system's allocator, counting live bytes, for both contenders alike; and what else the system says of the process.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::{AtomicI64, Ordering},
};

/// Bytes of all threads, as far as they were flushed.
static LIVE: AtomicI64 = AtomicI64::new(0);

/// A thread tells of its bytes when they are so many, so that counting costs the timing next to nothing.
const FLUSH: i64 = 4_096;

thread_local! {
    static PENDING: Cell<i64> = const { Cell::new(0) };
}

pub(crate) struct Counting;

// SAFETY: all requests go to the system's allocator as they are.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as i64 - layout.size() as i64);
        // SAFETY: the caller's.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn count(bytes: i64) {
    let flushed = PENDING.try_with(|pending| {
        let sum = pending.get() + bytes;
        pending.set(if sum.abs() < FLUSH { sum } else { 0 });
        if sum.abs() < FLUSH { 0 } else { sum }
    });
    let bytes = flushed.unwrap_or(bytes);
    if bytes != 0 {
        LIVE.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Live bytes, within some kilobytes.
pub(crate) fn live() -> i64 {
    LIVE.load(Ordering::Relaxed)
}

/// Resident bytes of the process.
pub(crate) fn rss() -> i64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    status.split(' ').nth(1).and_then(|pages| pages.parse::<i64>().ok()).unwrap_or(0) * 4096
}

/// User and system time of all threads so far.
pub(crate) fn cpu_seconds() -> f64 {
    let schedule = |task: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    };
    std::fs::read_dir("/proc/self/task").map_or(0.0, |tasks| tasks.filter_map(schedule).sum::<f64>() / 1e9)
}
