//! viva_core
