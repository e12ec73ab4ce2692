// Programs against E2B's own JavaScript SDK, as people write them: what differs from Python on the wire, and the main road.
//
// Run by ../sdk.rs with the four variables set, in a directory where npm has put the SDK.

import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'
import path from 'node:path'

const require = createRequire(path.join(process.cwd(), 'package.json'))
const sdk = await import(pathToFileURL(require.resolve('e2b').replace(/index\.js$/, 'index.mjs')))
const { Sandbox, NotFoundError, TimeoutError, CommandExitError, AuthenticationError } = sdk

const API = process.env.E2B_API_URL
const RUN = process.env.ICEBOX_SDK_RUN
const ODD = { run: RUN, 'odd key & more': 'a=b&c d%20+ü' }

const rows = []
const row = (name, check) => rows.push([name, check])

async function until(what, condition, seconds = 30) {
  const end = Date.now() + seconds * 1000
  for (;;) {
    const found = await condition()
    if (found) return found
    assert(Date.now() < end, `${what}: not within ${seconds} s`)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}

async function all(paginator) {
  const found = []
  while (paginator.hasNext) found.push(...(await paginator.nextItems()))
  return found
}

row('a sandbox is there when create returns', async (box) => {
  assert.match(box.sandboxId, /^i[a-z0-9]{20}$/)
  assert.equal(await box.isRunning(), true)
  const info = await box.getInfo()
  assert.deepEqual(info.metadata, ODD)
  assert.equal(info.state, 'running')
  assert.equal(info.envdVersion, '0.6.13')
  const again = await Sandbox.connect(box.sandboxId, { timeoutMs: 60_000 })
  assert.equal((await again.commands.run('echo hi')).stdout, 'hi\n')
  assert.deepEqual((await again.getInfo()).endAt, info.endAt)
})

row('lists are filtered and come in pages', async (box) => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000, metadata: { run: RUN } })
  const query = { metadata: { run: RUN }, state: ['running', 'paused'] }
  const found = await all(Sandbox.list({ query, limit: 1 }))
  assert.deepEqual(found.map((it) => it.sandboxId), [other.sandboxId, box.sandboxId])
  const one = await all(Sandbox.list({ query: { metadata: ODD } }))
  assert.deepEqual(one.map((it) => it.sandboxId), [box.sandboxId])
  assert.equal(await other.kill(), true)
  assert.equal(await Sandbox.kill(other.sandboxId), false)
  await assert.rejects(Sandbox.connect(other.sandboxId), NotFoundError)
})

row('errors have their own classes', async (box) => {
  await assert.rejects(Sandbox.create('nonexistent'), /404/)
  await assert.rejects(Sandbox.create('base', { apiKey: 'e2b_00' }), AuthenticationError)
  await assert.rejects(box.files.read('/not/there'), NotFoundError)
  await assert.rejects(box.commands.run('exit 3'), (error) => error instanceof CommandExitError && error.exitCode === 3)
  await assert.rejects(box.commands.run('sleep 600', { timeoutMs: 2000 }), TimeoutError)
})

row('a paused sandbox goes on where it was', async () => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000, envs: { KEPT: 'kept' } })
  const sleeping = await other.commands.run('sleep 600', { background: true })
  await other.pause()
  assert.equal(await other.isRunning(), false)
  assert.equal((await Sandbox.getInfo(other.sandboxId)).state, 'paused')
  const again = await Sandbox.connect(other.sandboxId, { timeoutMs: 300_000 })
  assert.equal((await again.commands.run('echo $KEPT')).stdout, 'kept\n')
  assert((await again.commands.list()).some((it) => it.pid === sleeping.pid))
  await again.kill()
  await assert.rejects(sleeping.wait())
})

row('snapshots and forks begin where their sandbox is', async (box) => {
  await box.files.write('/home/user/before', RUN)
  const snapshot = await box.createSnapshot()
  const [fork] = await box.fork({ timeoutMs: 120_000 })
  const other = await Sandbox.create(snapshot.snapshotId, { timeoutMs: 120_000 })
  for (const one of [fork.sandbox ?? fork, other]) {
    assert.equal(await one.files.read('/home/user/before'), RUN)
    await one.kill()
  }
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

row('commands stream, take input and are killed', async (box) => {
  let said = ''
  const done = await box.commands.run('echo out; echo err >&2; whoami; pwd', { onStdout: (data) => { said += data } })
  assert.equal(said, 'out\nuser\n/home/user\n')
  assert.equal(done.stderr, 'err\n')
  const cat = await box.commands.run('cat', { background: true, stdin: true })
  await box.commands.sendStdin(cat.pid, 'fed\n')
  await box.commands.closeStdin(cat.pid)
  assert.equal((await cat.wait()).stdout, 'fed\n')
  const sleeping = await box.commands.run('sleep 600', { background: true })
  assert.equal(await sleeping.kill(), true)
  await assert.rejects(sleeping.wait())
  assert.equal(await box.commands.kill(sleeping.pid), false)
  let shown = ''
  const terminal = await box.pty.create({ cols: 80, rows: 24, onData: (data) => { shown += Buffer.from(data) } })
  await box.pty.sendInput(terminal.pid, new TextEncoder().encode('tput cols 2>/dev/null || stty size; exit\n'))
  await terminal.wait()
  assert.match(shown, /80/)
})

row('files are written, read, listed and watched', async (box) => {
  const raw = new Uint8Array(300_000).map((_, at) => at % 251)
  await box.files.write('deep/raw', raw.buffer)
  assert.deepEqual(await box.files.read('deep/raw', { format: 'bytes' }), raw)
  await box.files.write([{ path: 'deep/a', data: 'a' }, { path: 'deep/b', data: 'b' }])
  const stream = await box.files.read('deep/raw', { format: 'stream' })
  let length = 0
  for await (const piece of stream) length += piece.length
  assert.equal(length, raw.length)
  assert.deepEqual((await box.files.list('deep')).map((it) => it.name).sort(), ['a', 'b', 'raw'])
  assert.equal(await box.files.makeDir('deep/new'), true)
  assert.equal(await box.files.makeDir('deep/new'), false)
  const events = []
  const watch = await box.files.watchDir('deep', (event) => events.push(`${event.type} ${event.name}`), { recursive: true })
  await box.files.write('deep/new/file', 'x')
  await until('the events', () => events.includes('create new/file') && events.includes('write new/file'))
  await watch.stop()
  await box.files.rename('deep/a', 'deep/c')
  assert.equal(await box.files.exists('deep/a'), false)
  await box.files.remove('deep')
  assert.equal(await box.files.exists('deep'), false)
})

row('signed URLs need nothing else', async (box) => {
  await box.files.write('signed', 'signed')
  const url = await box.downloadUrl('signed', { useSignatureExpiration: 60 })
  assert.equal(await (await fetch(url)).text(), 'signed')
  const form = new FormData()
  form.append('file', new Blob(['sent']))
  const sent = await fetch(await box.uploadUrl('uploaded', { user: 'user' }), { method: 'POST', body: form })
  assert.equal(sent.status, 200, await sent.text())
  assert.equal(await box.files.read('uploaded'), 'sent')
  assert.equal((await fetch(`${API}/files?path=signed`)).status, 401)
})

row('a killed sandbox cuts its streams', async () => {
  const other = await Sandbox.create('base', { timeoutMs: 300_000 })
  const sleeping = await other.commands.run('sleep 600', { background: true })
  const waiting = assert.rejects(sleeping.wait(), TimeoutError)
  assert.equal(await other.kill(), true)
  await waiting
  assert.equal(await other.isRunning(), false)
})

row('time runs out', async () => {
  const short = await Sandbox.create('base', { timeoutMs: 3000 })
  await until('its time is over', async () => !(await short.isRunning()), 20)
})

const wanted = process.argv.slice(2)
const failed = []
const box = await Sandbox.create('base', { timeoutMs: 900_000, metadata: ODD, envs: { SET: 'set' } })
for (const [name, check] of rows) {
  if (wanted.length && !wanted.some((word) => name.includes(word))) continue
  const begun = Date.now()
  let outcome = 'ok'
  try {
    await check(box)
  } catch (error) {
    console.error(error)
    failed.push(name)
    outcome = 'FAILED'
  }
  console.log(`  ${name}: ${outcome}, ${((Date.now() - begun) / 1000).toFixed(1)} s`)
}
for (const left of await all(Sandbox.list())) await Sandbox.kill(left.sandboxId)
if (failed.length) {
  console.error(`${failed.length} rows failed: ${failed.join(', ')}`)
}
process.exit(failed.length ? 1 : 0)
