//! Progress and messages while a run is built.

/// Receiver of progress and messages. Building takes time and makes choices, but has no access to the terminal.
pub trait Listener {
    /// Starts a task of `total` units; 0 if their number is not known.
    fn begin(&mut self, title: &str, total: u64);

    /// Reports the number of completed units.
    fn advance(&self, done: u64);

    /// Ends the task that was started last.
    fn end(&mut self);

    /// Shows a message.
    fn line(&self, text: &str);

    /// Shows a message even in quiet mode.
    fn warn(&self, text: &str);
}
