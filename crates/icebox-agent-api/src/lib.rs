//! What host and guest share: the agent's services, its client, its constants.
