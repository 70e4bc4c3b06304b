//! From the bytes of a request to a call of the [`FileSystem`], and the protocol's own requests.
//!
//! Exactly one completion per request, whatever its bytes: an answer if the requester left room for one, nothing for
//! FORGET, BATCH_FORGET and INTERRUPT. The session lives here and outlasts a connection, since a reconnecting VMM
//! goes on with it; INIT begins a new one at any time, because a rebooted guest does not say goodbye.
//!
//! Small requests take no lock and allocate nothing. The one lock, `beginning`, is taken by INIT and DESTROY only, and
//! no other is taken by us within it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::counted::Counted;
use super::decode::Args;
use super::decode::Refused;
use super::decode::decode;
use super::filesystem::FileSystem;
use super::filesystem::Request;
use super::filesystem::Session;
use super::init;
use super::limiter::Limiter;
use super::opcode;
use super::operation::Operation;
use super::reply::Reply;
use super::slot::ReplySlot;
use super::wire;
use crate::limits::GUEST_LOG_INTERVAL;
use crate::metrics::Metrics;
use crate::sys::sink::Sink;

/// Bytes of `fuse_in_header`.
const IN_HEADER_BYTES: usize = size_of::<wire::InHeader>();

/// Bits of [`Server::session`].
mod state {
    /// INIT has been answered.
    pub const READY: u32 = 1 << 0;
    /// OPEN and FLUSH are answered ENOSYS.
    pub const NO_OPEN: u32 = 1 << 1;
    /// OPENDIR is answered ENOSYS.
    pub const NO_OPENDIR: u32 = 1 << 2;
}

/// Serves the requests of one guest from one file system.
pub struct Server<F: FileSystem> {
    fs: F,
    metrics: Arc<Metrics>,
    /// `state` bits; 0 before INIT and after DESTROY.
    session: AtomicU32,
    /// Held while a session begins or ends, so that two INITs on two queues do not mix.
    beginning: Mutex<()>,
    malformed_log: Limiter,
    sessions_log: Limiter,
}

/// Whether `head` is an INIT, so that a transport can drop what it still holds of the session before.
pub fn is_init(head: &[u8]) -> bool {
    read_header(head).is_some_and(|header| header.opcode == opcode::INIT)
}

impl<F: FileSystem> Server<F> {
    /// A server of `fs`, before its first INIT.
    pub fn new(fs: F, metrics: Arc<Metrics>) -> Self {
        Self {
            fs,
            metrics,
            session: AtomicU32::new(0),
            beginning: Mutex::new(()),
            malformed_log: Limiter::new(GUEST_LOG_INTERVAL),
            sessions_log: Limiter::new(GUEST_LOG_INTERVAL),
        }
    }

    /// The file system.
    pub fn fs(&self) -> &F {
        &self.fs
    }

    /// Serves one request.
    ///
    /// `head` is what the transport copied out of the request, once: all of it, or its first
    /// `limits::REQUEST_HEAD_BYTES`, or only the fixed part of WRITE. `readable_bytes` is the length of the request in
    /// the requester's memory. The slot is completed exactly once: before this returns, or by whatever the file system
    /// moved it into. Does not block.
    pub fn handle<S: ReplySlot>(&self, head: &[u8], readable_bytes: usize, slot: S) {
        let Some(header) = read_header(head) else {
            let unique = head.get(8..16).and_then(|bytes| u64::read_from_bytes(bytes).ok()).unwrap_or(0);
            self.log(0, unique, "shorter than a header");
            return self.reply(slot, 0, unique).error(Errno::IO);
        };
        let args = match arguments(head, &header, readable_bytes) {
            Ok(args) => args,
            Err(refused) => return self.refuse(slot, &header, refused),
        };
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => {
                self.metrics.ops.hit(header.opcode);
                self.forget(&header, &args);
                slot.send_nothing();
            }
            opcode::INIT => self.init(&header, &args, self.reply(slot, header.opcode, header.unique)),
            opcode::DESTROY => {
                self.end_session();
                self.reply(slot, header.opcode, header.unique).empty();
            }
            _ => self.dispatch(&header, &args, slot),
        }
    }

    /// A request for the file system.
    fn dispatch<S: ReplySlot>(&self, header: &wire::InHeader, args: &Args<'_>, slot: S) {
        // Acquire: pairs with the Release in `init`, so that whoever serves in a session sees `begin_session` done.
        let session = self.session.load(Ordering::Acquire);
        let switched_off = match header.opcode {
            _ if session & state::READY == 0 => {
                return self.refuse(slot, header, Refused { errno: Errno::IO, reason: "no session" });
            }
            opcode::OPEN | opcode::FLUSH => session & state::NO_OPEN,
            opcode::OPENDIR => session & state::NO_OPENDIR,
            _ => 0,
        };
        if switched_off != 0 {
            return self.reply(slot, header.opcode, header.unique).error(Errno::NOSYS);
        }
        let operation = match decode(header.opcode, args) {
            Ok(operation) => operation,
            Err(refused) => return self.refuse(slot, header, refused),
        };
        let reply = self.reply(slot, header.opcode, header.unique);
        if let Operation::Read { size, .. } = operation
            && size as usize > reply.room()
        {
            // A shorter answer would be taken for the end of the file.
            self.log(header.opcode, header.unique, "READ into too little room");
            return reply.error(Errno::IO);
        }
        self.fs.call(&request(header, operation), reply);
    }

    /// Hands on what FORGET and BATCH_FORGET give back. There is nobody to tell an error.
    fn forget(&self, header: &wire::InHeader, args: &Args<'_>) {
        let one = |node: u64, lookups: u64| {
            let header = wire::InHeader { nodeid: node, ..*header };
            self.fs.call(&request(&header, Operation::Forget { lookups }), Reply::new(Unanswered, header.unique));
        };
        if self.session.load(Ordering::Acquire) & state::READY == 0 {
            return;
        }
        match header.opcode {
            opcode::FORGET => match wire::ForgetIn::read_from_prefix(args.copied) {
                Ok((wire::ForgetIn { nlookup }, _)) => one(header.nodeid, nlookup),
                Err(_) => self.log(header.opcode, header.unique, "arguments too short"),
            },
            opcode::BATCH_FORGET => match wire::BatchForgetIn::read_from_prefix(args.copied) {
                Ok((wire::BatchForgetIn { count, .. }, list)) => {
                    let (records, _) = list.as_chunks::<{ size_of::<wire::ForgetOne>() }>();
                    if count as usize > records.len() {
                        self.log(header.opcode, header.unique, "BATCH_FORGET announces more than it brings");
                    }
                    for record in records.iter().take(count as usize) {
                        let wire::ForgetOne { nodeid, nlookup } = zerocopy::transmute!(*record);
                        one(nodeid, nlookup);
                    }
                }
                Err(_) => self.log(header.opcode, header.unique, "arguments too short"),
            },
            _ => {}
        }
    }

    fn init<S: ReplySlot>(&self, header: &wire::InHeader, args: &Args<'_>, reply: Reply<S>) {
        let Some(offer) = init::Offer::read(args.copied) else {
            self.log(header.opcode, header.unique, "arguments too short");
            return reply.error(Errno::INVAL);
        };
        if offer.major > wire::MAJOR {
            self.end_session();
            return reply.body(&init::ask_for_our_major());
        }
        if offer.major < wire::MAJOR {
            self.end_session();
            return reply.error(Errno::PROTO);
        }
        let agreement = init::agree(&offer, self.fs.init_policy());
        let answer = agreement.answer.as_bytes().get(..agreement.answer_bytes).unwrap_or_default();
        if answer.len() > reply.room() {
            self.log(header.opcode, header.unique, "no room for the answer of INIT");
            return reply.error(Errno::IO);
        }
        self.begin_session(&agreement.session);
        if let Some(suppressed) = self.sessions_log.pass() {
            let Session { minor, no_open, no_opendir } = agreement.session;
            tracing::info!(minor, no_open, no_opendir, suppressed, "guest began a session");
        }
        reply.raw(answer, Errno::IO);
    }

    fn begin_session(&self, session: &Session) {
        let mut bits = state::READY;
        if session.no_open {
            bits |= state::NO_OPEN;
        }
        if session.no_opendir {
            bits |= state::NO_OPENDIR;
        }
        let _one = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        self.fs.begin_session(session);
        // Release: pairs with the Acquire in `dispatch`.
        self.session.store(bits, Ordering::Release);
    }

    fn end_session(&self) {
        let _one = self.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        self.session.store(0, Ordering::Release);
    }

    /// The reply to a request, counted.
    fn reply<S: ReplySlot>(&self, slot: S, opcode: u32, unique: u64) -> Reply<Counted<S>> {
        Reply::new(Counted::new(slot, &self.metrics, opcode), unique)
    }

    /// Completes a request that is not served.
    fn refuse<S: ReplySlot>(&self, slot: S, header: &wire::InHeader, refused: Refused) {
        self.log(header.opcode, header.unique, refused.reason);
        let reply = self.reply(slot, header.opcode, header.unique);
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => reply.nothing(),
            _ => reply.error(refused.errno),
        }
    }

    #[cold]
    fn log(&self, op: u32, unique: u64, reason: &'static str) {
        if tracing::enabled!(tracing::Level::DEBUG)
            && let Some(suppressed) = self.malformed_log.pass()
        {
            tracing::debug!(op, unique, reason, suppressed, "request refused");
        }
    }
}

fn read_header(head: &[u8]) -> Option<wire::InHeader> {
    wire::InHeader::read_from_prefix(head).ok().map(|(header, _)| header)
}

/// What lies behind the header. A length field beyond the request is a lie; one that is shorter leaves out the rest.
fn arguments<'a>(head: &'a [u8], header: &wire::InHeader, readable_bytes: usize) -> Result<Args<'a>, Refused> {
    let len = header.len as usize;
    let refused = Refused { errno: Errno::INVAL, reason: "length field disagrees with the request" };
    if len > readable_bytes {
        return Err(refused);
    }
    let total_bytes = len.checked_sub(IN_HEADER_BYTES).ok_or(refused)?;
    let copied = head.get(IN_HEADER_BYTES..len.min(head.len())).ok_or(refused)?;
    Ok(Args { copied, total_bytes })
}

fn request<'a>(header: &wire::InHeader, operation: Operation<'a>) -> Request<'a> {
    Request { unique: header.unique, node: header.nodeid, uid: header.uid, gid: header.gid, pid: header.pid, operation }
}

/// The reply of FORGET: there is none, whatever the file system does with it.
struct Unanswered;

impl ReplySlot for Unanswered {
    fn capacity(&self) -> usize {
        0
    }

    fn send(self, _parts: &[&[u8]]) {}

    fn send_data<F>(self, _unique: u64, _fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
    }

    fn send_nothing(self) {}
}
