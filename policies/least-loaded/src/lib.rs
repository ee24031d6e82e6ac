//! ll
