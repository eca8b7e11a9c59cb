/* Search without a server: browsers start no worker for a page of file://, so its script runs in a hidden frame. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.loaded = new Promise((done) => this.frame.addEventListener("load", done));
      this.frame.addEventListener("message", (event) => this.dispatchEvent(new MessageEvent("message", event)));
      this.frame.srcdoc = `<script>postMessage = (data) => frameElement.dispatchEvent(new MessageEvent("message", {data}))
        </script><script src="${url}"></script>`;
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
