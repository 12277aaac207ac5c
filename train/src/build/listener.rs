//! Progress and remarks while a run is built.

/// Receiver of progress and remarks. Building takes time and makes choices, and knows no terminal.
pub trait Listener {
    /// Starts something of `total` units; 0 when their number is not known.
    fn begin(&mut self, title: &str, total: u64);

    /// Number of units that are done.
    fn advance(&self, done: u64);

    /// Ends what was started last.
    fn end(&mut self);

    /// A remark.
    fn line(&self, text: &str);

    /// A remark that is shown also to those who want to see nothing else.
    fn warn(&self, text: &str);
}
