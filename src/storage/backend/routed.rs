//! Blobs that come from several places: most from the usual one, some from one of their own.

use std::collections::HashMap;

use super::Answer;
use super::Backend;
use super::Request;
use super::Ticket;
use crate::storage::sync::Arc;

/// Backends by blob.
#[derive(Debug)]
pub struct Routed {
    usual: Arc<dyn Backend>,
    others: HashMap<String, Arc<dyn Backend>>,
}

impl Routed {
    /// Blobs whose ids are in `others` come from there, all others from `usual`.
    pub fn new(usual: Arc<dyn Backend>, others: HashMap<String, Arc<dyn Backend>>) -> Self {
        Self { usual, others }
    }
}

impl Backend for Routed {
    fn read(&self, request: Request, answer: Answer) -> Ticket {
        self.others.get(&*request.blob).unwrap_or(&self.usual).read(request, answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::storage::backend::BackendError;
    use crate::storage::backend::Class;

    #[derive(Debug)]
    struct Says(&'static str);

    impl Backend for Says {
        fn read(&self, _: Request, answer: Answer) -> Ticket {
            answer.complete(Err(BackendError::Lasting(self.0.to_owned())));
            Ticket::none()
        }
    }

    #[test]
    fn blob_with_a_place_of_its_own_comes_from_there() {
        let place = |name| Arc::new(Says(name)) as Arc<dyn Backend>;
        let others = HashMap::from([("a".to_owned(), place("one")), ("b".to_owned(), place("two"))]);
        let routed = Routed::new(place("usual"), others);
        for (blob, expected) in [("a", "one"), ("b", "two"), ("c", "usual")] {
            let (tell, told) = mpsc::channel();
            let request = Request { blob: Arc::from(blob), range: 0..1, class: Class::Demand, deadline: None };
            routed.read(request, Answer::new(move |result| tell.send(result).unwrap()));
            assert_eq!(told.recv().unwrap().unwrap_err().to_string(), expected);
        }
    }
}
