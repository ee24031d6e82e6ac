//! rr
