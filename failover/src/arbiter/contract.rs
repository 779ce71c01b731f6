//! What every arbiter must do, as a test suite.
