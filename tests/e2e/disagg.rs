//! Prefill and decode on different workers: what clients see of it, and what becomes of them when it goes wrong.

mod between;
mod doubles;
mod mocks;
mod receipts;
mod rooms;
